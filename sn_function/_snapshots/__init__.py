"""Files: the entries of snapshots, and what becomes of each."""
