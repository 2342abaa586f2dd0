"""State: what is remembered, shared by all ranks or local to one."""
