"""The library alone, no service: learns from the pairs in my_pairs/, leaves new ones in new_pairs/."""

import cffa_core as cffa

base = cffa.load_base("tiny")  # or an SD 1.5 folder, or a hub id
pairs = cffa.load_pairs("my_pairs/", resolution=512)  # in any of the three layouts, or a zip
model = cffa.train(base, pairs, steps=200, seed=1, out="runs/first")
for pair in model.sample(8, seed=1, steps=25):
    pair.save("new_pairs/")  # cf/000000.png, fa/000000.png, ...
