"""Consensus: the wire. It knows no gate and no state."""
