"""Optuna studies that several workers share: storages, claims, signs of life."""
