// fio over libnbd: random writes of several clients at depth, verified by their checksums.
import Testing

@Suite struct FioTests {
    @Test(arguments: ["--writable", "--overlay"], ["randwrite", "randrw"])
    func `random writes are read back as they were written`(_ access: String, _ kind: String) throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 32 << 20)
        try serving([access, image], in: folder) { (gateway) throws in
            let outcome = try Tool("fio").run([
                "--name=verify", "--ioengine=nbd", "--uri=\(gateway.uri())", "--rw=\(kind)", "--bsrange=512-96k",
                "--blockalign=512", "--size=24M", "--iodepth=16", "--verify=crc32c", "--do_verify=1",
                "--verify_fatal=1",
                "--verify_state_save=0", "--randseed=42",
            ])
            #expect(outcome.status == 0, "\(outcome.text)\(outcome.errors)")
        }
    }
}
