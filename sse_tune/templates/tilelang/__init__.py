"""TileLang templates: GDN's stages with tensor-core instructions and copies in flight written out, for NVIDIA GPUs."""
