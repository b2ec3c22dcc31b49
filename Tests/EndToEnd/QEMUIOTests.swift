// qemu-io: patterns written, zeroed, discarded, flushed and read back, on writable exports and overlays.
import Testing

@Suite struct QEMUIOTests {
    @Test(arguments: ["--writable", "--overlay"])
    func `patterns come back, and zeros where zeros were asked for`(_ access: String) throws {
        let folder = try Folder()
        let image = try folder.filled("disk")
        try serving([access, image], in: folder) { (gateway) throws in
            let commands = [
                "write -P 0xaa 0 1M", "write -z 256k 256k", "read -P 0xaa 0 256k", "read -P 0 256k 256k",
                "read -P 0xaa 512k 512k", "write -z -u 1000 3001", "read -P 0 1000 3001", "read -P 0xaa 999 1",
                "read -P 0xaa 4001 1", "write -f -P 0x11 5M 9M", "read -P 0x11 5M 9M", "discard 6M 1M", "flush",
                "read -P 0x11 5M 1M", "read -P 0x11 7M 7M", "read -P 0x5a 14M 10M", "write -P 3 25165823 1",
                "read -P 3 25165823 1", "aio_write -P 4 16M 2M", "aio_write -P 5 18M 2M", "aio_flush",
                "read -P 4 16M 2M",
                "read -P 5 18M 2M",
            ]
            let outcome = try Tool("qemu-io").run(["-f", "raw"] + commands.flatMap { ["-c", $0] } + [gateway.uri()])
            #expect(outcome.status == 0 && !outcome.text.contains("failed"), "\(outcome.text)\(outcome.errors)")
        }
        let before = try folder.filled("before")
        #expect(try isSame(image, before) == (access == "--overlay"))
    }

    @Test func `what one client wrote, another reads, and the file has it in the end`() throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 4 << 20)
        try serving(["--writable", image], in: folder) { (gateway) throws in
            try run("qemu-io", "-f", "raw", "-c", "write -P 9 1M 1M", gateway.uri())
            try run("qemu-io", "-f", "raw", "-r", "-c", "read -P 9 1M 1M", "-c", "read -P 0x5a 0 1M", gateway.uri())
        }
        try run("qemu-io", "-f", "raw", "-r", "-c", "read -P 9 1M 1M", "-c", "read -P 0x5a 2M 2M", image)
    }
}
