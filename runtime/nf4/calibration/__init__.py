"""What a model's linear layers read, collected for the compiler: `nf4 calibrate`."""
