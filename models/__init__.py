"""The models shipped with pvae: one per file, written exactly as a user's own file would be."""

if __name__ == "models":  # imported from the repository root by mistake
    raise ImportError("import pvae.models, not models: two copies would not share classes")
