"""Requests, drivers, chains: what a disk is made of."""
