"""The clock: which generation, step, branch, denoiser and patch a forward pass belongs to."""
