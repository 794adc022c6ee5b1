"""Commands, hosts and processes: the only room that knows all the others."""
