"""What judges the package: cases, tolerances and costs of every op, and honest timing."""
