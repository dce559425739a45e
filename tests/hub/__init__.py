"""A disk-backed Hugging Face Hub on loopback, and clients of it in processes of their own."""

from .client import Client, ClientError
from .handler import Entry, Fault
from .server import LoopbackHub


__all__ = ["Client", "ClientError", "Entry", "Fault", "LoopbackHub"]
