"""Exact search through products of 8-bit integers, with hand-written processor instructions."""
