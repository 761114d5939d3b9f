"""The proof that a run worked: measured once on held-out prompts, written as a card, a README and a page.

models.py      base, student and teacher of a run, loaded once
measure.py     every number of the card
scorers.py     what a user calls right
readme.py      the model card for the Hub
page.py        one self-contained HTML page; charts.py draws its plots
differences.py two runs' cards compared (no torch)
"""
