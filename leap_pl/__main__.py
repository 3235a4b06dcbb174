from leap_pl.cli.main import console

if __name__ == "__main__":
    console()
