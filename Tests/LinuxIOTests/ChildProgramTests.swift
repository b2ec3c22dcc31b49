// Programs that are run to their end: what they say, and that their time is limited whatever they do.
import Block
import Glibc
import LinuxIO
import Support
import Testing

@Suite struct ChildProgramTests {
    @Test func `a program's words and its status are taken`() throws {
        let result = try ChildProgram.run(["sh", "-c", "echo out; echo err >&2; exit 7"], seconds: 60)
        #expect(result.status == 7)
        #expect(result.output == Array("out\n".utf8) && result.errors == Array("err\n".utf8))
    }

    @Test(arguments: ["sleep 600", "exec >&- 2>&-; sleep 600"])
    func `a program that does not end is ended`(script: String) throws {
        try requireError(.inputOutput, "sh") { _ = try ChildProgram.run(["sh", "-c", script], seconds: 0.2) }
    }
}
