// Data that could not be stored is told to everybody who flushes afterwards, not only to the first.
import Block
import Testing

@testable import LinuxIO

@Suite struct LostWritesTests {
    @Test func everyLaterFlushFails() throws {
        let lost = LostWrites()
        func flush(_ failure: BlockError?) throws(BlockError) {
            try lost.guarding("disk") { () throws(BlockError) in
                if let failure { throw failure }
            }
        }
        try flush(nil)
        // Running out of space is told to the one who wrote; nothing that was accepted before is lost.
        #expect(throws: BlockError.self) { try flush(BlockError(.noSpace, "full")) }
        try flush(nil)
        #expect(throws: BlockError.self) { try flush(BlockError(.inputOutput, "bad")) }
        for _ in 0..<3 {
            let error = #expect(throws: BlockError.self) { try flush(nil) }
            #expect(error?.kind == .inputOutput)
        }
    }
}
