"""What a study leaves on disk: whole files, folder locks, run folders with manifest and rows, and their origin."""
