"""Numbers in, numbers out: no mesh, no config, no input or output."""
