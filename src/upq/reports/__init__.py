"""What people see of a run: one page that holds its figures, and the same figures as JSON."""
