"""What is measured of the project, and how; of a checkout, not of the wheel."""
