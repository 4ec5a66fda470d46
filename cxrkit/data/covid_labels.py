"""The labels of the combined COVID-19 set, which the phantom draws and the real set has: 14 labels, alphabetical."""

from __future__ import annotations

__all__ = ["HIERARCHY", "LABELS"]

LABELS = (
    "ARDS",
    "Bacterial Pneumonia",
    "COVID-19",
    "Chlamydophila",
    "Fungal Pneumonia",
    "Klebsiella",
    "Legionella",
    "MERS",
    "No Finding",
    "Pneumocystis",
    "Pneumonia",
    "SARS",
    "Streptococcus",
    "Viral Pneumonia",
)
HIERARCHY = {
    **dict.fromkeys(("COVID-19", "MERS", "SARS"), "Viral Pneumonia"),
    **dict.fromkeys(("Chlamydophila", "Klebsiella", "Legionella", "Streptococcus"), "Bacterial Pneumonia"),
    "Pneumocystis": "Fungal Pneumonia",
    **dict.fromkeys(("ARDS", "Bacterial Pneumonia", "Fungal Pneumonia", "Viral Pneumonia"), "Pneumonia"),
}
