"""One process, several devices: each block on one of them, and none waits for a later one."""
