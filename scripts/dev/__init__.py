"""Training, sweeps and the writers of pages: what makes this project, and no user needs."""
