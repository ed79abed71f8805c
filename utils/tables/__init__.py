"""Rows beside the papers': published figures, own runs, their comparison and report; recipes and grids of runs that fill them."""
