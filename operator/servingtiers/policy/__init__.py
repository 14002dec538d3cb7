"""What we decide: tier presets, sizing, scaling, conditions. Pure; the modules do not know each other."""
