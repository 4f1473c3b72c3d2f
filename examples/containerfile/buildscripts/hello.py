"""Build the Containerfile hello."""

image = Image.build("src/Containerfile", context="src")
image.save("hello.tar")
