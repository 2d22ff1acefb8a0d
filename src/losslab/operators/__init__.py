"""model + loss + data -> v ↦ A v"""
