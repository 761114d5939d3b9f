"""Systems side by side: trained with the same budget and several seeds, measured in the same way."""
