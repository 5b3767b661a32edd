"""Training: config and trainer in pairs; and the recipe of the embedded LVLM, `mosaic_lvlm`."""
