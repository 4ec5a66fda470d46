"""Synthetic frontal chest radiographs with findings whose true region is known by construction.

Every image that comes from here is drawn by a program; none shows a person.
"""

from __future__ import annotations
