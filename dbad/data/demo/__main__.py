"""python -m dbad.data.demo OUT: draw the demo data."""

from dbad.data.demo.draw import main

if __name__ == "__main__":
    main()
