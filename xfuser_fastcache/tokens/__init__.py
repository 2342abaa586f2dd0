"""Token plans: which image tokens run through the blocks of a computed span?"""
