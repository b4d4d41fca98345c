"""Compiled versions of the operations in `reference`, one package per kind of device."""
