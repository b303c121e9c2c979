"""What a run needs of the hardware, before it is paid for."""
