"""The runtime: a whole network as one list of kernel calls on panels."""
