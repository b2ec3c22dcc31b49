// A thin wrapper around SQLite: as much as an index needs that can be thrown away at any time.
import Block
import CSQLite

/// An open database.
final class SQLite {
    private let database: OpaquePointer
    private let path: String

    /// A value of a column.
    enum Value {
        case integer(Int64)
        case text(String)
    }

    /// Opens a database, which is made where there is none.
    ///
    /// - Throws: `BlockError` when it is none, or cannot be opened.
    init(_ path: String) throws(BlockError) {
        var opened: OpaquePointer?
        let result = sqlite3_open_v2(path, &opened, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, nil)
        guard result == SQLITE_OK, let opened else {
            sqlite3_close(opened)
            throw BlockError(.inputOutput, "opening \(path): \(String(cString: sqlite3_errstr(result)))")
        }
        database = opened
        self.path = path
        sqlite3_busy_timeout(database, 10_000)
    }

    deinit { sqlite3_close(database) }

    private func failure(_ doing: String) -> BlockError {
        BlockError(.inputOutput, "\(doing) \(path): \(String(cString: sqlite3_errmsg(database)))")
    }

    /// Runs statements that have no parameters and give no rows.
    func execute(_ statements: String) throws(BlockError) {
        if sqlite3_exec(database, statements, nil, nil, nil) != SQLITE_OK { throw failure("changing") }
    }

    /// Runs one statement and hands over its rows.
    func run(
        _ statement: String, _ values: [Value] = [], _ row: (Row) throws(BlockError) -> Void = { _ in }
    ) throws(BlockError) {
        var prepared: OpaquePointer?
        guard sqlite3_prepare_v2(database, statement, -1, &prepared, nil) == SQLITE_OK, let prepared else {
            throw failure("asking")
        }
        defer { sqlite3_finalize(prepared) }
        // SQLite makes a copy of its own (SQLITE_TRANSIENT).
        let transient = unsafeBitCast(-1, to: sqlite3_destructor_type.self)
        for (index, value) in values.enumerated() {
            let result =
                switch value {
                case .integer(let number): sqlite3_bind_int64(prepared, Int32(index + 1), number)
                case .text(let text): sqlite3_bind_text(prepared, Int32(index + 1), text, -1, transient)
                }
            if result != SQLITE_OK { throw failure("asking") }
        }
        while true {
            switch sqlite3_step(prepared) {
            case SQLITE_DONE: return
            case SQLITE_ROW: try row(Row(statement: prepared))
            default: throw failure("asking")
            }
        }
    }

    /// A row of a result, valid while it is handed over.
    struct Row {
        fileprivate let statement: OpaquePointer

        func integer(_ column: Int32) -> Int64 { sqlite3_column_int64(statement, column) }
        func text(_ column: Int32) -> String {
            sqlite3_column_text(statement, column).map { String(cString: $0) } ?? ""
        }
    }

    /// Runs a body in one transaction: all of it happens, or nothing.
    func transaction(_ body: () throws(BlockError) -> Void) throws(BlockError) {
        try execute("BEGIN IMMEDIATE")
        do throws(BlockError) {
            try body()
            try execute("COMMIT")
        } catch {
            _ = sqlite3_exec(database, "ROLLBACK", nil, nil, nil)
            throw error
        }
    }
}
