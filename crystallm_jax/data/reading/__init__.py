"""What a user has on disk: archives, tables, pickles and frames as records, and records as structures."""
