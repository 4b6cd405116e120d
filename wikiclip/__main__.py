from wikiclip.cli import main

main()
