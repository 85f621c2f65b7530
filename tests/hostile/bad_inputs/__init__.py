"""Every class of bad input that users may meet: how to build it, and what must become of it."""
