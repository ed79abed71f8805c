"""Behind utils.compare_tables and utils.table: published and own results, their statistics, and the plan of a table."""
