"""What every stage shares: errors, JSON Lines with rejects, atomic file writes, the network guard, the command line."""
