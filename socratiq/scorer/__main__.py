from socratiq.run.errors import main
from socratiq.scorer.fit import fit_scorer

if __name__ == "__main__":
    main(fit_scorer)
