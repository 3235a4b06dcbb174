from leap_pl.cli import console

if __name__ == "__main__":
    console()
