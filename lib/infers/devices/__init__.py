"""The devices of this process: who computes where, and what becomes of a device that fails."""
