"""Export: a catalog and a checkpoint in, a bundle out."""
