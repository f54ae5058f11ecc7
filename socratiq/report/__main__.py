from socratiq.report.page import write
from socratiq.run.errors import main

if __name__ == "__main__":
    main(write)
