"""Architectures: the paper's networks that other libraries lack, and the names under which all are built."""
