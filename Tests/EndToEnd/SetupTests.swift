// `diskgate setup` on a tree: what it writes, what it says of it, and that it takes away only its own.
import Testing

@Suite struct SetupTests {
    private let rule = "etc/udev/rules.d/05-diskgate.rules"

    @Test func `setup is missing, in force, and gone again`() throws {
        let folder = try Folder()
        let root = folder.path
        let before = try attempt("diskgate", "setup", "--check", "--root", root)
        #expect(before.status == 1 && before.text.contains("udev       missing"))
        let done = try run("diskgate", "setup", "--root", root).text
        #expect(done.contains("udev       in force") && done.contains("wrote /\(rule)"))
        #expect(try run("diskgate", "setup", "--check", "--json", "--root", root).text.contains("\"in force\""))
        let written = try run("cat", "\(root)/\(rule)").text
        #expect(written.contains("UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG"))
        // Which SCSI disks the machine has that this runs on is of no account.
        try run("diskgate", "setup", "--remove", "--force", "--root", root)
        #expect(try run("find", root, "-type", "f").text.isEmpty)
        #expect(try attempt("diskgate", "setup", "--check", "--root", root).status == 1)
    }

    @Test func `a rule that somebody has changed stays, and the way out is named`() throws {
        let folder = try Folder()
        try run("diskgate", "setup", "--root", folder.path)
        try run("sh", "-c", "echo '# mine' >>'\(folder.path)/\(rule)'")
        let again = try attempt("diskgate", "setup", "--root", folder.path)
        #expect(again.status == 1 && again.errors.contains("somebody has changed it"))
        #expect(try run("tail", "-1", "\(folder.path)/\(rule)").text == "# mine\n")
        #expect(try attempt("diskgate", "setup", "--remove", "--force", "--root", folder.path).status == 1)
    }

    @Test func `a ledger that cannot be read is no ledger without disks`() throws {
        let folder = try Folder()
        let state = "\(folder.path)/state"
        try run("mkdir", "-p", "\(state)/obligations", "\(folder.path)/root")
        try run("sh", "-c", "echo nonsense >'\(state)/obligations/1.run'")
        let words = ["setup", "--root", "\(folder.path)/root", "--state-directory", state]
        let refused = try Tool.diskgate.run(words)
        #expect(refused.status == 1 && refused.errors.contains("which disks diskgate has added"), "\(refused)")
        #expect(try run("find", "\(folder.path)/root", "-type", "f").text.isEmpty)
        #expect(try Tool.diskgate.run(words + ["--remove"]).status == 0)
    }
}
