"""Own rows beside the papers': published figures, own runs, their comparison, and the commands that fill a table."""
