"""What test modules share: worlds of real ranks, tiny models, options, calibrations."""
