"""Reading teachers and students, and writing checkpoint folders."""
